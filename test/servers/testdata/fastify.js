const fastify = require('fastify')();

fastify.get('/', async () => {
  await new Promise((done) => setTimeout(done, 20));
  return String(process.pid);
});
fastify.listen({ port: Number(process.env.PORT), host: '127.0.0.1' });
