# SPDX-License-Identifier: BSD-3-Clause
"""A model of Triton's Python backend; the folder's name is the name of the network.

config.pbtxt names weights, dtype and the number of classes to return. Weights that are a file
there, beside config.pbtxt, are that file.
"""

import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils

from resnet_fused import Predictor


class TritonPythonModel:
    """What Triton looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model once per instance."""
        config = json.loads(args["model_config"])
        options = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        beside = os.path.join(args["model_repository"], options["weights"])
        gpu = args["model_instance_kind"] == "GPU"
        self.predictor = Predictor(
            config["name"],
            beside if os.path.isfile(beside) else options["weights"],
            dtype=options.get("dtype", "fp32"),
            top=int(options.get("top", 5)),
            device=f"cuda:{args['model_instance_device_id']}" if gpu else "cpu",
        )

    def execute(self, requests: list) -> list:
        """Run the images of all requests as one batch, and give each request its rows."""
        files = [pb_utils.get_input_tensor_by_name(r, "image").as_numpy() for r in requests]
        result = self.predictor({"bytes": np.concatenate(files).reshape(-1)})
        result["error"] = result["error"].reshape(-1, 1)
        ends = np.cumsum([len(images) for images in files])
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(key, rows[end - len(own) : end]) for key, rows in result.items()]
            )
            for end, own in zip(ends, files, strict=True)
        ]
