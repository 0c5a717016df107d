// One measurement of one of Node's pools: node peer.mjs KIND WORKERS CONCURRENCY MILLISECONDS
import { createRequire } from 'node:module'
const require = createRequire(import.meta.url)
const [kind, workers, concurrency, ms] = process.argv.slice(2).map((a, i) => i === 0 ? a : Number(a))
const here = new URL('.', import.meta.url).pathname
let run, end
if (kind === 'seed') {
  const { ProcessPool } = require('./seed-pool.cjs')
  const p = new ProcessPool(workers, here + 'worker.cjs')
  run = (t) => p.execute(t)
  end = () => process.exit(0)
} else if (kind === 'tinypool') {
  const { Tinypool } = await import('tinypool')
  const p = new Tinypool({ runtime: 'child_process', filename: here + 'tinypool-worker.mjs', minThreads: workers, maxThreads: workers })
  run = (t) => p.run(t)
  end = () => process.exit(0)
} else {
  const p = require('workerpool').pool(here + 'workerpool-worker.cjs', { workerType: 'process', minWorkers: workers, maxWorkers: workers })
  run = (t) => p.exec('work', [t])
  end = () => process.exit(0)
}
async function drive (ms, times) {
  const until = performance.now() + ms
  let done = 0
  await Promise.all(Array.from({ length: concurrency }, async () => {
    for (let now = performance.now(); now < until;) {
      const r = await run({ n: done })
      if (typeof r.n !== 'number') throw new Error('wrong answer')
      // To look at the clock is no part of a task; where one waits for the
      // other it is what is asked for.
      if (++done % 16 === 0 || concurrency === 1) {
        const then = performance.now()
        times?.push(then - now)
        now = then
      }
    }
  }))
  return done
}
await drive(500)
const times = []
const from = performance.now()
const n = await drive(ms, times)
const took = performance.now() - from
times.sort((a, b) => a - b)
console.log(JSON.stringify({ rate: n / took * 1000, p50: times[times.length >> 1] * 1000 / (concurrency > 1 ? 16 : 1) }))
end()
