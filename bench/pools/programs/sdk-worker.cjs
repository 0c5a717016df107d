const { serve } = require(process.env.BENCH_SDK + '/node/remuda-worker.cjs')
serve({ '': (t) => ({ n: t.data.n * 2 }) })
