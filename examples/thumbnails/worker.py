"""A worker in Python: a task is {"in": …, "out": …, "size": …}."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "..", "sdk", "python"))

import png  # noqa: E402
import remuda_worker  # noqa: E402


def thumbnail(task):
    job = task.data
    width, height = png.shrink(job["in"], job["out"], job["size"])
    return {"out": job["out"], "width": width, "height": height}


remuda_worker.serve(thumbnail)
