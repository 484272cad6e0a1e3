"""Events of a session in MLflow: ``pip install espalier[mlflow]``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class MLflow:
    """Writes to the active run of MLflow, as `mlflow.start_run` made it."""

    def __init__(self) -> None:
        self._events: list[str] = []

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """As metrics."""
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """MLflow knows none: as an artifact of all values, and metrics of the smallest, the mean and the largest."""
        import mlflow

        mlflow.log_dict({"step": step, "values": values.tolist()}, f"{name}/{step:08d}.json")
        summary = {"min": values.min(), "mean": values.mean(), "max": values.max()}
        mlflow.log_metrics({f"{name}_{which}": float(value) for which, value in summary.items()}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        """As lines of one artifact."""
        import mlflow

        self._events.append(f"{step}: {text}")
        mlflow.log_text("\n".join(self._events), f"{name}.txt")


__all__ = ["MLflow"]
