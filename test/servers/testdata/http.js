// A server as everybody writes it: not a word about cluster or signals.
const http = require('http');

http.createServer((req, res) => {
  setTimeout(() => res.end(String(process.pid)), 20);
}).listen(process.env.PORT);
