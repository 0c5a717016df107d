const apps = [{ name: 'esm', script: './app/app.js', cron_restart: '0 3 * * *', args: ['--flag', 7] }];
export default { apps };
