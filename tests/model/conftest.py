import pytest

from benchmarks.untrained import noise_pipeline
from memflow.stream.pipeline import MemFlowPipeline


@pytest.fixture(scope="session")
def toy() -> MemFlowPipeline:
    """The embedded model. Streams share it: they keep everything of their own to themselves."""
    pipeline = noise_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
