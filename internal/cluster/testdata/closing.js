// Passes a socket (which is not taken), then listens, and closes on demand.
const net = require('net');
const server = net.createServer((s) => s.end('hello'));
server.listen(Number(process.argv[2]), '127.0.0.1');
process.on('message', (m) => {
  if (m === 'close') server.close(() => process.send('closed'));
  if (m === 'handle') process.send({ here: 'a server' }, server);
});
