// A web server that is handed its socket. Node's cluster mode (exec_mode:
// cluster) needs none of this; it is for programs that shall have one in fork
// mode.
const http = require('http');

let leaving = false;
const server = http.createServer((req, res) => {
  if (leaving) res.setHeader('Connection', 'close');
  setTimeout(() => res.end(`${process.pid}\n`), 20); // the work
});
const handed = process.env.LISTEN_PID === String(process.pid);
server.listen(handed ? { fd: 3 } : { port: 8080, host: '127.0.0.1' });

process.on('SIGTERM', () => {
  leaving = true;
  server.closeIdleConnections = () => {}; // a request may be on its way on them
  server.close(() => process.exit(0));
  setTimeout(() => process.exit(0), 5000).unref();
});
