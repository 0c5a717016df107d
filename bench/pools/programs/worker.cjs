// The worker of the seed's pool, and of ours.
process.on('message', (task) => process.send({ n: task.n * 2 }));
