// libbpf-ts: typed bindings to libbpf.so.1. This list is the whole interface.

export {
  attachTcx,
  attachXdp,
  type Direction,
  detachXdp,
  hasTcx,
  hasTcxLink,
  Link,
  type LinkInfo,
  linkIds,
  linkInfo,
  openLinkById,
  openPinnedLink,
  queryTcx,
  queryXdp,
  type TcxProgram,
  type XdpMode,
  type XdpProgram,
} from "./attach.ts";
export {
  type ArrayLayout,
  type Btf,
  BtfError,
  type BytesLayout,
  type EnumLayout,
  type Field,
  type Layout,
  type MapLayout,
  type OpaqueLayout,
  readBtf,
  type ScalarKind,
  type ScalarLayout,
  type StructLayout,
} from "./btf.ts";
export {
  attachClsact,
  type ClsactFilter,
  destroyClsact,
  detachClsact,
  type FilterPlace,
  hasClsact,
  queryClsact,
} from "./clsact.ts";
export { type Codec, CodecError, codec, type Value } from "./codec.ts";
export { type Compiled, CompileError, type CompileOptions, compile } from "./compile.ts";
export { type Abi, type AbiMap, abiDifference, abiDigest, describeAbi, generate } from "./generate.ts";
export {
  type Handle,
  isBpffs,
  LibbpfError,
  type LogLevel,
  mountBpffs,
  possibleCpus,
  raiseMemlock,
  setLibbpfLog,
  unpin,
} from "./libbpf.ts";
export {
  BatchError,
  type Block,
  BPF_ANY,
  BPF_EXIST,
  BPF_NOEXIST,
  BpfMap,
  type Entry,
  hasMapType,
  type MapInfo,
  mapIds,
  mapInfo,
  openMapById,
  openPinnedMap,
} from "./map.ts";
export {
  type BpfObject,
  LayoutMismatch,
  layoutOfMap,
  openObject,
  type RodataValue,
  VerifierError,
} from "./object.ts";
export {
  enableStats,
  hasHelper,
  openPinnedProgram,
  openProgramById,
  Program,
  type ProgramInfo,
  programIds,
  programInfo,
  type TestResult,
  type TestRun,
} from "./program.ts";
export { RingBuffer } from "./ring.ts";
