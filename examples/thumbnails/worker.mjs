// A worker in Node: a task is {"in": …, "out": …, "size": …}.
import sharp from 'sharp'
import { serve } from '../../sdk/node/remuda-worker.mjs'

sharp.concurrency(1) // the pool sees to that all cores are busy

serve(async (task) => {
  const { in: source, out, size } = task.data
  const { width, height } = await sharp(source).resize(size, size, { fit: 'inside' }).png().toFile(out)
  return { out, width, height }
})
