// The process pool of the course that this project grew from, as it stands there.
const { fork } = require('child_process');

class ProcessPool {
  constructor(size, workerPath) {
    this.size = size;
    this.workerPath = workerPath;
    this.workers = [];
    this.queue = [];
    this.init();
  }

  init() {
    for (let i = 0; i < this.size; i++) {
      this.createWorker();
    }
  }

  createWorker() {
    const worker = fork(this.workerPath);
    worker.available = true;

    worker.on('message', (result) => {
      this.handleResult(worker, result);
    });

    worker.on('exit', (code) => {
      this.handleWorkerExit(worker, code);
    });

    this.workers.push(worker);
    return worker;
  }

  async execute(task) {
    return new Promise((resolve, reject) => {
      const job = { task, resolve, reject };
      const worker = this.getAvailableWorker();

      if (worker) {
        this.runJob(worker, job);
      } else {
        this.queue.push(job);
      }
    });
  }

  getAvailableWorker() {
    return this.workers.find(w => w.available && w.connected);
  }

  runJob(worker, job) {
    worker.available = false;
    worker.currentJob = job;
    worker.send(job.task);
  }

  handleResult(worker, result) {
    if (worker.currentJob) {
      worker.currentJob.resolve(result);
      worker.currentJob = null;
    }

    worker.available = true;
    this.processQueue();
  }

  processQueue() {
    while (this.queue.length > 0) {
      const worker = this.getAvailableWorker();
      if (!worker) break;

      const job = this.queue.shift();
      this.runJob(worker, job);
    }
  }

  handleWorkerExit(worker, code) {
    const index = this.workers.indexOf(worker);
    if (index !== -1) {
      this.workers.splice(index, 1);
      this.createWorker(); // Auto-restart
    }
  }

  async shutdown() {
    await Promise.all(
      this.workers.map(w => this.shutdownWorker(w))
    );
  }

  shutdownWorker(worker) {
    return new Promise((resolve) => {
      worker.on('exit', resolve);
      worker.kill('SIGTERM');
    });
  }
}

module.exports = { ProcessPool };
