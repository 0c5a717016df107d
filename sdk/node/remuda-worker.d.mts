// One set of types for both: see remuda-worker.d.cts.
export * from './remuda-worker.cjs'
