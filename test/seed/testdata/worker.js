// Worker process
process.on('message', (msg, socket) => {
  if (msg === 'socket' && socket) {
    // Handle the socket in worker
    socket.end('Handled by worker\n');
  }
});
