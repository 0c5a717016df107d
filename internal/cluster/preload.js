// Loaded by Remuda into the workers of an app in cluster mode (exec_mode:
// cluster), before the program. When the worker is asked to disconnect, Node
// closes its servers, but a connection that is kept alive and busy would hold
// the worker for ever, and one that is idle would be cut while a request is on
// its way. So from that moment on each response says "Connection: close", and
// idle connections have a little while to be used once more.
'use strict';
const IDLE = 500; // ms

// The program and its children shall not see how this file came here.
const options = process.env.NODE_OPTIONS || '';
const own = options.lastIndexOf('--require');
if (own > 0) process.env.NODE_OPTIONS = options.slice(0, own).trimEnd();
else delete process.env.NODE_OPTIONS;

process.prependListener('internalMessage', function leave(m) {
  if (!m || m.cmd !== 'NODE_CLUSTER' || m.act !== 'disconnect') return;
  process.removeListener('internalMessage', leave);
  require('diagnostics_channel').channel('http.server.request.start').subscribe(({ response }) => {
    response.shouldKeepAlive = false;
  });
  for (const { Server } of [require('http'), require('https')]) {
    const closeIdle = Server.prototype.closeIdleConnections;
    if (!closeIdle) continue; // before Node 18.2, which leaves them open
    Server.prototype.closeIdleConnections = function () {
      if (!(this.keepAliveTimeout > 0 && this.keepAliveTimeout < IDLE)) this.keepAliveTimeout = IDLE;
      setTimeout(() => closeIdle.call(this), IDLE).unref();
    };
  }
});
