module.exports = {
  apps: [{
    name: "api",
    script: "./app/server.js",
    instances: "max",
    exec_mode: "cluster",
    max_memory_restart: "300M",
    env: { NODE_ENV: "development", PORT: 3000, NESTED: { a: [1, true] } },
    env_production: { NODE_ENV: "production", PORT: 80 },
    wait_ready: true,
    listen_timeout: 5000,
    kill_timeout: 3000,
    merge_logs: true,
    log_date_format: "YYYY-MM-DD HH:mm:ss.SSS Z",
    out_file: "logs/out.log",
    error_file: "logs/err.log",
  }],
  deploy: { production: { user: "node", host: "example.org", env: { FROM_DEPLOY: "1" } } },
};
