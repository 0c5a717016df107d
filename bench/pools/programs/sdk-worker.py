import os, sys
sys.path.insert(0, os.environ["BENCH_SDK"] + "/python")
import remuda_worker
remuda_worker.serve({"": lambda t: {"n": t.data["n"] * 2}})
