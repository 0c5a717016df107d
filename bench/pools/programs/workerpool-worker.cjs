require('workerpool').worker({ work: (task) => ({ n: task.n * 2 }) })
