"""Events in MLflow."""

import os
from pathlib import Path

os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the small package has no database, and files have to be asked for

import mlflow
from small import log

from espalier.adapters.mlflow import MLflow

mlflow.set_tracking_uri(Path("logs").resolve().as_uri())
with mlflow.start_run():
    log(MLflow())
