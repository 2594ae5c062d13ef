# SPDX-License-Identifier: BSD-3-Clause
"""Images over HTTP in dynamic batches: python examples/litserve_server.py --weights resnet50.pth
curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:8000/predict"""

import argparse
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body
from fastapi.responses import JSONResponse

from resnet_fused import Predictor


class Classify(litserve.LitAPI):
    def setup(self, device):
        self.predictor = Predictor(self.model, self.weights, device=device)

    def decode_request(self, request: Annotated[bytes, Body()]):
        return request

    def predict(self, files):
        result = self.predictor({"bytes": np.array(files, dtype=object)})
        return [dict(zip(result, row, strict=True)) for row in zip(*result.values(), strict=True)]

    def encode_response(self, row):
        if row["error"]:  # of this image alone: an exception would fail the whole batch
            return JSONResponse({"detail": row["error"]}, status_code=400)
        return {key: row[key].tolist() for key in ("index", "prob", "label")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in ("weights", None), ("model", "resnet50"), ("port", "8000"):
        parser.add_argument(f"--{option}", default=default)
    args, api = parser.parse_args(), Classify(max_batch_size=16, batch_timeout=0.005)
    api.model, api.weights = args.model, args.weights
    server = litserve.LitServer(api, max_payload_size=64 * 2**20)  # on GPUs where there are some
    server.run(port=args.port, host="127.0.0.1", generate_client_file=False)
