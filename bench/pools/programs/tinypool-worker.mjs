export default (task) => ({ n: task.n * 2 })
