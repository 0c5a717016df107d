const socket = require('dgram').createSocket('udp4');
socket.on('message', (m, from) => socket.send(process.pid + ' ' + m, from.port, from.address));
socket.bind(Number(process.argv[2]), '127.0.0.1');
