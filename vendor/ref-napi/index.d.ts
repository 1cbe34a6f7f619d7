import ref = require('@2060.io/ref-napi');
export = ref;
