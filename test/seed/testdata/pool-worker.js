// The worker of the seed's process pool: what it is sent is the task, what it
// sends back is the result.
process.on('message', (task) => {
  process.send(work(task))
})

function work (task) {
  if (task.exit !== undefined) process.exit(task.exit)
  if (task.hang) for (;;);
  return { square: task.n * task.n, pid: process.pid }
}
