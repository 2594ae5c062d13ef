# SPDX-License-Identifier: BSD-3-Clause
"""Classify image files with Spark: spark-submit examples/spark.py IMAGES WEIGHTS OUTPUT"""

import sys


def make_predict_fn(weights, model="resnet50"):
    """What predict_batch_udf wants: a function that loads the model once per Python worker."""

    def load():
        from resnet_fused import Predictor  # here, because this runs on the workers

        predictor = Predictor(model, weights, threads=1)  # Spark runs one task per core
        return lambda files: predictor({"bytes": files})

    return load


if __name__ == "__main__":
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.types import ArrayType, FloatType, LongType, StringType, StructType

    images, weights, output = sys.argv[1:]
    row = StructType().add("index", ArrayType(LongType())).add("prob", ArrayType(FloatType()))
    row = row.add("label", ArrayType(StringType())).add("error", StringType())
    classify = predict_batch_udf(make_predict_fn(weights), return_type=row, batch_size=64)
    files = SparkSession.builder.getOrCreate().read.format("binaryFile").load(images)
    files.select("path", classify("content").alias("result")).write.parquet(output)
