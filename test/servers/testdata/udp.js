const socket = require('dgram').createSocket('udp4');

socket.on('message', (msg, from) => {
  socket.send(`${process.pid} ${msg}`, from.port, from.address);
});
socket.bind(Number(process.env.PORT), '127.0.0.1');
