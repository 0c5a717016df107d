// A server without a word about signals, in cluster mode.
require('http').createServer((req, res) => {
  setTimeout(() => res.end(`${process.pid}\n`), 20);
}).listen(process.env.PORT, '127.0.0.1');
