"""One measurement of multiprocessing.Pool: peer.py WORKERS CONCURRENCY MILLISECONDS"""
import json, multiprocessing, sys, threading, time


def work(task):
    return {"n": task["n"] * 2}


def drive(pool, concurrency, seconds, times):
    end = time.perf_counter() + seconds
    if concurrency == 1:
        n = 0
        now = time.perf_counter()
        while now < end:
            pool.apply(work, ({"n": n},))
            then = time.perf_counter()
            times.append(then - now)
            now = then
            n += 1
        return n
    # As many as concurrency under way, by callbacks: a thread for each caller
    # would measure the interpreter's lock.
    lock, over = threading.Lock(), threading.Event()
    state = {"n": 0, "open": concurrency}

    def done(_, began=0.0):
        now = time.perf_counter()
        with lock:
            state["n"] += 1
            if now >= end:
                state["open"] -= 1
                if state["open"] == 0:
                    over.set()
                return
        pool.apply_async(work, ({"n": 1},), callback=done)

    for _ in range(concurrency):
        pool.apply_async(work, ({"n": 1},), callback=done)
    over.wait()
    return state["n"]


if __name__ == "__main__":
    workers, concurrency, ms = map(int, sys.argv[1:])
    with multiprocessing.Pool(workers) as pool:
        drive(pool, concurrency, 0.3, [])
        times = []
        began = time.perf_counter()
        n = drive(pool, concurrency, ms / 1000, times)
        took = time.perf_counter() - began
    times.sort()
    p50 = times[len(times) // 2] * 1e6 if times else 0
    print(json.dumps({"rate": n / took, "p50": p50}))
