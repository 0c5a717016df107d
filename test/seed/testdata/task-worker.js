// The worker of the seed's distributed task queue.
process.on('message', ({ taskId, task }) => {
  try {
    process.send({ taskId, result: fibonacci(task.n) })
  } catch (err) {
    process.send({ taskId, error: err.message })
  }
})

function fibonacci (n) {
  if (!Number.isInteger(n) || n < 0) throw new Error('not a natural number: ' + n)
  let [a, b] = [0, 1]
  for (; n > 0; n--) [a, b] = [b, a + b]
  return a
}
