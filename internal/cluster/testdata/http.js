// A server as people write them, without a word about cluster or signals.
const http = require('http');
const ports = process.argv[2].split(',');
const delay = Number(process.argv[3] || 0);
for (const p of ports) {
  http.createServer((req, res) => {
    setTimeout(() => res.end(String(process.pid)), delay);
  }).listen(/^\d+$/.test(p) ? Number(p) : p);
}
