"""Every setting of a run: frozen pydantic models, one file per stage, read from YAML plus `key.path=value` overrides.

`sparsity` is always the fraction of weights removed. In a pattern "N:M", N of every M consecutive input weights are
kept. The defaults are what we would use ourselves; `None` means "off" or "chosen by the run".
"""

from calibprune.config.base import Section, Url
from calibprune.config.curate import CurateSettings
from calibprune.config.evaluate import EvaluateSettings, ReportSettings
from calibprune.config.generate import GenerateSettings
from calibprune.config.model import ClusterSettings, ModelSettings
from calibprune.config.prune import PruneSettings


class Config(Section):
    model: ModelSettings
    output: Url
    """URL of the run folder, which holds everything that a run creates."""
    cluster: ClusterSettings = ClusterSettings()
    generate: GenerateSettings = GenerateSettings()
    curate: CurateSettings = CurateSettings()
    prune: PruneSettings = PruneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
