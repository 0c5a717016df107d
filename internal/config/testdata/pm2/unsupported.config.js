module.exports = {
  apps: [{
    name: 'odd',
    script: './app/app.js',
    treekill: false,
    pid_file: '/tmp/x.pid',
    vizion: false,
    pmx: true,
    watch: true,
    watch_options: { usePolling: true, followSymlinks: false },
    log_date_format: 'YYYY-Qo',
    instanses: 3,
    listen_timeout: 100,
    env_staging: {},
  }],
};
