exports.port = 4000;
