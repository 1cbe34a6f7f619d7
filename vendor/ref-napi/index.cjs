module.exports = require('@2060.io/ref-napi');
