"""Models that transformers and vLLM do not know. Nothing is registered by importing; see `register`."""


def register() -> None:
    """Makes transformers' Auto classes load DCLM, pruned by calibprune or as OpenLM published it."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from calibprune.models import dclm

    for config, model, causal in (
        (dclm.DclmConfig, dclm.DclmModel, dclm.DclmForCausalLM),
        (dclm.OpenLMConfig, dclm.OpenLMModel, dclm.OpenLMForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
    dclm.register_published_names()


def register_with_vllm() -> None:
    """Makes vLLM serve DCLM on its transformers backend. vLLM calls this in each of its processes, since it is an entry
    point of the group `vllm.general_plugins`."""
    from vllm import ModelRegistry

    register()
    for architecture in ("DclmForCausalLM", "OpenLMForCausalLM"):
        ModelRegistry.register_model(
            architecture, "calibprune.models.dclm_vllm:TransformersForCausalLM"
        )
