// A server that ends by itself when it is told to, in cluster mode.
const server = require('http').createServer((req, res) => {
  setTimeout(() => res.end(`${process.pid}\n`), 20);
}).listen(process.env.PORT, '127.0.0.1');

process.on('SIGTERM', () => server.close(() => process.exit(0)));
