const server = require('net').createServer();
server.on('error', (e) => { process.send({ code: e.code, errno: e.errno }); });
server.listen(Number(process.argv[2]), '127.0.0.1');
