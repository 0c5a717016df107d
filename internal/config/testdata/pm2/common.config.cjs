module.exports = { apps: [{ name: 'cjs', script: './app/worker.js', node_args: '--max-old-space-size=512 --inspect', increment_var: 'PORT', env: { PORT: 3000 }, instances: 2, exec_mode: 'fork' }] };
