const app = require('express')();

app.get('/', (req, res) => {
  setTimeout(() => res.send(String(process.pid)), 20);
});
app.listen(process.env.PORT);
