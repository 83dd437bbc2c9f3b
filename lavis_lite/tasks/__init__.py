"""Tasks: what is computed for each sample, how it is scored, and which files are written."""

from lavis_lite.common.lazy import lazy_names

__all__ = ["setup_task"]
__getattr__ = lazy_names(__name__, {"setup_task": "lavis_lite.tasks.base"})
