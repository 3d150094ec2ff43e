from __future__ import annotations

from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from remote_vae.server import ray_app
from tests.cluster.conftest import ROOT


def test_the_yaml_of_the_docs_is_taken_by_ray_and_by_the_app() -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "docs" / "cluster.yaml").read_text(encoding="utf-8")))
    (application,) = schema.applications
    assert application.import_path == f"{ray_app.__name__}:app"
    front: Any = ray_app.app(application.args)._bound_deployment
    assert front.name == ray_app.FRONT
    names, _, _, *bound = front.init_args
    numbers = {each._bound_deployment.name: each._bound_deployment._deployment_config for each in bound}
    assert list(numbers) == names == list(application.args["vaes"])
    scaling = numbers["sdxl"].autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 16)
