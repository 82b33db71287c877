"""Models as plain modules that know no parallel axis; what parallelism needs of them is spec.contract.Stack."""

from stretto.models.build import build_model
from stretto.models.context import Context

__all__ = ["Context", "build_model"]
