const path = require('path');
const os = require('os');
const names = require('./names.json');
const { port } = require('./helper');
console.log('this must not break the reading');
module.exports = {
  apps: names.map((name, i) => ({
    name,
    script: path.join(__dirname, 'app', 'app.js'),
    cwd: __dirname,
    instances: Math.min(1, os.cpus().length),
    exec_mode: 'fork_mode',
    env: { PORT: port + i, WHO: process.env.WHO || 'nobody' },
    ignore_watch: [/node_modules/, 'logs', '\\.git'],
    watch: ['.'],
  })),
};
