// The worker of the seed's process supervisor: it works, and answers its health
// checks.
let checks = 0
process.on('message', (msg) => {
  if (msg.type === 'health_check') {
    checks++
    process.send({ type: 'health_check_response' })
    return
  }
  if (msg.hang) for (;;);
  setTimeout(() => process.send({ checks }), msg.sleep)
})
