"""Events in MLflow."""

import mlflow
from small import log

from espalier.adapters.mlflow import MLflow

mlflow.set_tracking_uri("sqlite:///logs.db")
with mlflow.start_run():
    log(MLflow())
