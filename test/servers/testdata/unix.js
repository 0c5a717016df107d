const http = require('http');

http.createServer((req, res) => {
  setTimeout(() => res.end(String(process.pid)), 20);
}).listen(process.env.SOCKET);
