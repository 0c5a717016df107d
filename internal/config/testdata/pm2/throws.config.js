const x = 1;

module.exports = { apps: missing.list };
