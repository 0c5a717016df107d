// Worker side of the frames protocol (docs/worker-protocol.md) for Node.js 18
// and newer. No dependencies but the file beside it.
//
//   import { serve } from './remuda-worker.mjs'
//   await serve({ thumbnail: async (task) => { …; return { width, height } } })
import cjs from './remuda-worker.cjs'

export const { serve, open, Worker, Task, Message, TaskError } = cjs
