"""Every setting of a run: frozen pydantic models, one file per stage, read from YAML plus `key.path=value` overrides.

`sparsity` is always the fraction of weights removed. In a pattern "N:M", N of every M consecutive
input weights are kept. Defaults are the ones we would use ourselves; `None` means "off" or "decide by itself".
"""

from calibprune.config.base import Section, TextSource, Url
from calibprune.config.curate import (
    AnalysisSettings,
    CurateSettings,
    DuplicateFilter,
    Filter,
    GeneratedSource,
    LengthFilter,
    NaturalSource,
    PerplexityFilter,
    Reference,
    RepetitionFilter,
    Sharing,
    Source,
)
from calibprune.config.evaluate import (
    EvaluateSettings,
    HeldOutText,
    ReportSettings,
    TrackingSettings,
)
from calibprune.config.generate import (
    BosPrefixes,
    DatasetPrefixes,
    GenerateSettings,
    Prefixes,
    PromptPrefixes,
    TemperatureSchedule,
    VocabularyPrefixes,
)
from calibprune.config.model import ClusterSettings, ModelSettings
from calibprune.config.prune import (
    ALPS,
    OWL,
    RIA,
    Allocation,
    AlphaPruning,
    DSnoT,
    ListAllocation,
    Magnitude,
    Method,
    PruneSettings,
    SparseGPT,
    Swaps,
    UniformAllocation,
    Wanda,
    parse_pattern,
)


class Config(Section):
    model: ModelSettings
    output: Url
    """URL of the run folder; everything a run makes lies in there."""
    cluster: ClusterSettings = ClusterSettings()
    generate: GenerateSettings = GenerateSettings()
    curate: CurateSettings = CurateSettings()
    prune: PruneSettings = PruneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
