// Greedy text from a converted model, on macOS 15 or iOS 18. Untested: its makers had no Mac. predict.py beside it does the same,
// and its Host is the code that ran when the packages were verified; where the two differ, that one is right.
//
//     swiftc -O -parse-as-library example.swift -o example && ./example 0 17 42    // token ids of the prompt; prints those that follow
//
// Text to ids and back is the business of a tokenizer library (swift-transformers reads tokenizer.json). Packages with states only.

import CoreML
import Foundation

struct Contract: Decodable {
    struct Part: Decodable {
        let file: String
        let functions: [String: [String: [Int]]]  // function -> input -> shape
        let logits: [String]
    }
    struct Sizes: Decodable {
        let head_dim: Int?
        let rope_theta: Double?
        let window: Int?
    }
    let model: Sizes
    let target: String
    let context: Int?
    let prefill: Int
    let embeddings: [Int]
    let stop_ids: [Int]
    let packages: [Part]
}

struct ContextIsFull: Error {
    let tokens: Int, context: Int  // convert.py --context=N makes packages for more
}

final class LanguageModel {
    let contract: Contract
    let table: Data  // embeddings.bin, fp16 [V, C], mapped and not read
    var models: [[String: MLModel]] = []
    var states: [MLState] = []
    var position = 0

    init(folder: URL) async throws {
        contract = try JSONDecoder().decode(Contract.self, from: Data(contentsOf: folder.appending(path: "config.json")))
        table = try Data(contentsOf: folder.appending(path: "embeddings.bin"), options: .alwaysMapped)
        for part in contract.packages {
            let compiled = try await MLModel.compileModel(at: folder.appending(path: part.file))
            var functions: [String: MLModel] = [:]
            for name in part.functions.keys {
                let options = MLModelConfiguration()
                options.functionName = name
                options.computeUnits = contract.target == "ane" ? .cpuAndNeuralEngine : .cpuAndGPU
                functions[name] = try MLModel(contentsOf: compiled, configuration: options)
            }
            states.append(functions["decode"]!.makeState())
            models.append(functions)
        }
    }

    /// An input in its declared shape: `value(token, feature)`, in the order of memory that the target has.
    func array(_ shape: [Int], tokens: Int, transposed: Bool, _ value: (Int, Int) -> Float) throws -> MLMultiArray {
        let array = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float16)
        let features = shape.reduce(1, *) / tokens
        array.withUnsafeMutableBytes { raw, _ in
            let numbers = raw.bindMemory(to: Float16.self)
            for t in 0..<tokens {
                for f in 0..<features { numbers[transposed ? f * tokens + t : t * features + f] = Float16(value(t, f)) }
            }
        }
        return array
    }

    func step(_ ids: [Int]) async throws -> [Float] {
        let Q = ids.count, function = Q == 1 ? "decode" : "prefill", start = position, C = contract.embeddings[1]
        let columns = contract.target == "ane"  // channels before tokens
        var hidden: MLMultiArray?
        var logits: [Float] = []
        for (number, part) in contract.packages.enumerated() {
            var inputs: [String: MLFeatureValue] = [:]
            for (name, shape) in part.functions[function]! {
                let value: MLMultiArray
                switch name {
                case "x", "token":
                    if let hidden, name == "x" { value = hidden } else {
                        value = try table.withUnsafeBytes { raw in
                            let rows = raw.bindMemory(to: Float16.self)
                            return try array(shape, tokens: Q, transposed: columns) { t, f in Float(rows[ids[t] * C + f]) }
                        }
                    }
                case "cos", "sin":
                    let D = contract.model.head_dim!, theta = Float(contract.model.rope_theta!)
                    value = try array(shape, tokens: Q, transposed: columns) { t, f in
                        let angle = Float(start + t) * pow(theta, -Float(2 * f) / Float(D))
                        return name == "cos" ? cos(angle) : sin(angle)
                    }
                case "mask_full":
                    value = try array(shape, tokens: Q, transposed: false) { t, key in key <= start + t ? 0 : -10_000 }
                case "mask_window":
                    let S = shape.last!, window = contract.model.window!
                    value = try array(shape, tokens: Q, transposed: false) { t, slot in
                        let query = start + t, key = start + Q - S + slot  // the cache ends with the newest token
                        return key >= 0 && key <= query && key > query - window ? 0 : -10_000
                    }
                default:  // position
                    value = try MLMultiArray(shape: [1], dataType: .int32)
                    value[0] = NSNumber(value: start)
                }
                inputs[name] = MLFeatureValue(multiArray: value)
            }
            let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
            let result = try await models[number][function]!.prediction(from: provider, using: states[number])
            hidden = result.featureValue(for: "hidden")?.multiArrayValue
            if hidden == nil {
                for name in part.logits {
                    let values = result.featureValue(for: name)!.multiArrayValue!
                    logits += (0..<values.count).map { values[$0].floatValue }
                }
            }
        }
        position += Q
        return logits
    }

    /// Whole chunks as long as there are any, then token by token: padding would spoil the states. Beyond the context the full caches
    /// would be written past their ends.
    func feed(_ tokens: [Int]) async throws -> [Float] {
        if let context = contract.context, position + tokens.count > context {
            throw ContextIsFull(tokens: position + tokens.count, context: context)
        }
        var ids = tokens[...], logits: [Float] = []
        while !ids.isEmpty {
            let n = ids.count >= contract.prefill ? contract.prefill : 1
            logits = try await step(Array(ids.prefix(n)))
            ids = ids.dropFirst(n)
        }
        return logits
    }
}

@main struct Example {
    static func main() async throws {
        let model = try await LanguageModel(folder: URL(filePath: "."))
        var ids = CommandLine.arguments.dropFirst().compactMap { Int($0) }
        if ids.isEmpty { ids = [0] }
        let room = model.contract.context.map { $0 - ids.count + 1 } ?? 64  // the last token is not read any more
        for _ in 0..<max(1, min(64, room)) {
            let logits = try await model.feed(ids)
            let token = logits.indices.max { logits[$0] < logits[$1] }!
            if model.contract.stop_ids.contains(token) { break }
            print(token, terminator: " ")
            ids = [token]
        }
    }
}
