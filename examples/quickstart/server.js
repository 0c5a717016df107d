// A small HTTP server. PORT says where it listens.
const http = require('http')

const port = Number(process.env.PORT || 8425)
let served = 0

const server = http.createServer((req, res) => {
  res.setHeader('content-type', 'text/plain; charset=utf-8')
  if (req.url === '/healthz') return res.end('ok\n')
  served++
  console.log(`${req.method} ${req.url}`)
  res.end(`Hello from process ${process.pid}, ${served} served\n`)
})

server.on('error', (err) => {
  if (err.code === 'EADDRINUSE') {
    console.error(`port ${port} is in use; set PORT to another one: PORT=9000 make run`)
  } else {
    console.error(err.message)
  }
  process.exit(1)
})

server.listen(port, '127.0.0.1', () => console.log(`listening on http://127.0.0.1:${port}/`))

process.on('SIGTERM', () => {
  console.log('finishing what is in flight')
  server.close(() => process.exit(0))
  server.closeIdleConnections()
})
