// Two servers of one program: the site, and its metrics on a port beside.
const http = require('http');

const answer = (req, res) => setTimeout(() => res.end(String(process.pid)), 20);
http.createServer(answer).listen(process.env.PORT);
http.createServer(answer).listen(process.env.METRICS_PORT, '127.0.0.1');
