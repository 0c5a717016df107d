// Express's app.listen, and a program that something keeps alive for ever.
const http = require('http');
const app = (req, res) => { res.setHeader('x-worker', require('cluster').worker.id); res.end(req.url); };
app.listen = function () { return http.createServer(this).listen(...arguments); };
setInterval(() => {}, 1000);
app.listen(Number(process.argv[2]), '127.0.0.1', () => process.send('ready'));
process.on('message', (m) => { if (m === 'shutdown') process.exit(7); else process.send({ echo: m }); });
